#pragma once

#include <vector>

#include "selm/kernels/device_memory.hpp"

namespace selm::test {

template<typename T>
DeviceBuffer copy_to(Device device, const std::vector<T>& values)
{
    DeviceBuffer buffer(device, values.size() * sizeof(T));
    buffer.copy_from_host(values.data(), buffer.bytes());
    return buffer;
}

/// All bytes of the buffer, as numbers of type T.
template<typename T>
std::vector<T> on_host(const DeviceBuffer& buffer)
{
    std::vector<T> values(buffer.bytes() / sizeof(T));
    buffer.copy_to_host(values.data(), buffer.bytes());
    return values;
}

} // namespace selm::test
