#pragma once
#include <string>
namespace tvm {
namespace support {
inline bool StartsWith(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }
}  // namespace support
}  // namespace tvm
