#pragma once

#include <utility>

namespace selm {

/// Runs a function when the scope is left, by an exception too; the function may not throw.
template<typename Function>
class ScopeEnd {
  public:
    explicit ScopeEnd(Function function) : function_(std::move(function)) {}
    ~ScopeEnd() { function_(); }
    ScopeEnd(const ScopeEnd&) = delete;
    ScopeEnd& operator=(const ScopeEnd&) = delete;

  private:
    Function function_;
};

} // namespace selm
