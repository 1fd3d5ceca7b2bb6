#pragma once

#include <memory>

#include "selm/kernels/engine.hpp"

// Factories behind make_engine(). Each throws Error configuration when its engine cannot run here.
namespace selm {

std::unique_ptr<Engine> make_xsmm_engine(const EngineOptions& options);
std::unique_ptr<Engine> make_aten_engine(const EngineOptions& options);

} // namespace selm
