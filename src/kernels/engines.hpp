#pragma once

#include <memory>

#include "selm/kernels/engine.hpp"

// Factories behind make_engine(). Each throws Error configuration when its engine cannot run here.
namespace selm {

std::unique_ptr<Engine> make_xsmm_engine(const EngineOptions& options);
std::unique_ptr<Engine> make_aten_engine(const EngineOptions& options);

/// What libselm_aten.so exports as selm_make_aten_engine. The caller owns the engine.
using AtenEngineFactory = Engine*(const EngineOptions& options);

} // namespace selm

extern "C" selm::AtenEngineFactory selm_make_aten_engine;
