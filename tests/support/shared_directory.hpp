#pragma once

#include <memory>
#include <string>

#include "selm/comm/communicator.hpp"
#include "temporary_directory.hpp"

namespace selm::test {

/// A temporary directory that all ranks know; rank 0 makes it and removes it at the end (collective).
class SharedDirectory {
  public:
    explicit SharedDirectory(Communicator& comm) : comm_(comm)
    {
        if (comm.is_root())
            own_ = std::make_unique<TemporaryDirectory>();
        name_ = own_ ? own_->path("") : "";
        broadcast_string(comm, name_, 0, "temporary directory");
    }
    ~SharedDirectory() { comm_.barrier("end of a temporary directory"); }
    SharedDirectory(const SharedDirectory&) = delete;
    SharedDirectory& operator=(const SharedDirectory&) = delete;

    std::string path(const std::string& name) const { return name_ + name; }

  private:
    Communicator& comm_;
    std::unique_ptr<TemporaryDirectory> own_;
    std::string name_;
};

} // namespace selm::test
