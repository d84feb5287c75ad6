// What TVM's web runtime includes of `tvm/support/{io,serializer}.h` and `src/support/bytes_io.h`,
// which its wheel does not bring: streams of bytes, little-endian, as dmlc-core wrote them.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace tvm {
namespace support {

class Stream;

template <typename T, typename = void>
struct Serializer {
  static constexpr bool enabled = std::is_arithmetic_v<T> || std::is_enum_v<T>;
  static void Write(Stream* stream, const T& value);
  static bool Read(Stream* stream, T* value);
};

class Stream {
 public:
  virtual ~Stream() = default;
  virtual size_t Read(void* data, size_t size) = 0;
  virtual size_t Write(const void* data, size_t size) = 0;

  template <typename T>
  void Write(const T& value) {
    Serializer<T>::Write(this, value);
  }
  template <typename T>
  bool Read(T* value) {
    return Serializer<T>::Read(this, value);
  }
  template <typename T>
  void WriteArray(const T* values, size_t count) {
    for (size_t i = 0; i < count; ++i) Write<T>(values[i]);
  }
  template <typename T>
  bool ReadArray(T* values, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      if (!Read<T>(values + i)) return false;
    }
    return true;
  }
};

template <typename T, typename V>
void Serializer<T, V>::Write(Stream* stream, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>, "needs a serializer of its own");
  stream->Write(static_cast<const void*>(&value), sizeof(T));
}

template <typename T, typename V>
bool Serializer<T, V>::Read(Stream* stream, T* value) {
  static_assert(std::is_trivially_copyable_v<T>, "needs a serializer of its own");
  return stream->Read(static_cast<void*>(value), sizeof(T)) == sizeof(T);
}

template <>
struct Serializer<DLDevice> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const DLDevice& device) {
    stream->Write<int32_t>(static_cast<int32_t>(device.device_type));
    stream->Write<int32_t>(device.device_id);
  }
  static bool Read(Stream* stream, DLDevice* device) {
    int32_t type = 0, id = 0;
    if (!stream->Read(&type) || !stream->Read(&id)) return false;
    *device = {static_cast<DLDeviceType>(type), id};
    return true;
  }
};

template <>
struct Serializer<std::string> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::string& text) {
    stream->Write<uint64_t>(text.size());
    stream->Write(static_cast<const void*>(text.data()), text.size());
  }
  static bool Read(Stream* stream, std::string* text) {
    uint64_t size = 0;
    if (!stream->Read(&size)) return false;
    text->resize(size);
    return size == 0 || stream->Read(static_cast<void*>(text->data()), size) == size;
  }
};

template <>
struct Serializer<ffi::String> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::String& text) {
    Serializer<std::string>::Write(stream, std::string(text.data(), text.size()));
  }
  static bool Read(Stream* stream, ffi::String* text) {
    std::string read;
    if (!Serializer<std::string>::Read(stream, &read)) return false;
    *text = ffi::String(std::move(read));
    return true;
  }
};

template <typename T>
struct Serializer<std::vector<T>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::vector<T>& values) {
    stream->Write<uint64_t>(values.size());
    stream->WriteArray(values.data(), values.size());
  }
  static bool Read(Stream* stream, std::vector<T>* values) {
    uint64_t size = 0;
    if (!stream->Read(&size)) return false;
    values->resize(size);
    return stream->ReadArray(values->data(), size);
  }
};

template <typename T>
struct Serializer<ffi::Array<T>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::Array<T>& values) {
    stream->Write<uint64_t>(values.size());
    for (const T& value : values) Serializer<T>::Write(stream, value);
  }
  static bool Read(Stream* stream, ffi::Array<T>* values) {
    uint64_t size = 0;
    if (!stream->Read(&size)) return false;
    ffi::Array<T> read;
    for (uint64_t i = 0; i < size; ++i) {
      T value{};
      if (!Serializer<T>::Read(stream, &value)) return false;
      read.push_back(std::move(value));
    }
    *values = std::move(read);
    return true;
  }
};

// Maps: their size, then every key with its value.
template <typename M, typename K, typename V>
void WriteMap(Stream* stream, const M& map) {
  stream->Write<uint64_t>(map.size());
  for (const auto& [key, value] : map) {
    Serializer<K>::Write(stream, key);
    Serializer<V>::Write(stream, value);
  }
}

template <typename K, typename V, typename Put>
bool ReadMap(Stream* stream, Put put) {
  uint64_t size = 0;
  if (!stream->Read(&size)) return false;
  for (uint64_t i = 0; i < size; ++i) {
    K key{};
    V value{};
    if (!Serializer<K>::Read(stream, &key) || !Serializer<V>::Read(stream, &value)) return false;
    put(std::move(key), std::move(value));
  }
  return true;
}

template <typename K, typename V>
struct Serializer<std::unordered_map<K, V>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::unordered_map<K, V>& map) {
    WriteMap<std::unordered_map<K, V>, K, V>(stream, map);
  }
  static bool Read(Stream* stream, std::unordered_map<K, V>* map) {
    map->clear();
    return ReadMap<K, V>(stream, [map](K key, V value) { (*map)[std::move(key)] = std::move(value); });
  }
};

template <typename K, typename V>
struct Serializer<ffi::Map<K, V>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::Map<K, V>& map) {
    WriteMap<ffi::Map<K, V>, K, V>(stream, map);
  }
  static bool Read(Stream* stream, ffi::Map<K, V>* map) {
    *map = ffi::Map<K, V>();
    return ReadMap<K, V>(stream, [map](K key, V value) { map->Set(std::move(key), std::move(value)); });
  }
};

class BytesInStream : public Stream {
 public:
  template <typename Bytes>
  explicit BytesInStream(const Bytes& bytes) : data_(bytes.data()), size_(bytes.size()) {}
  using Stream::Read;
  using Stream::Write;
  size_t Read(void* data, size_t size) override {
    size = size < size_ - at_ ? size : size_ - at_;
    if (size != 0) std::memcpy(data, data_ + at_, size);
    at_ += size;
    return size;
  }
  size_t Write(const void*, size_t) override { return 0; }

 private:
  const char* data_;
  size_t size_;
  size_t at_ = 0;
};

class BytesOutStream : public Stream {
 public:
  explicit BytesOutStream(std::string* out) : out_(out) {}
  using Stream::Read;
  using Stream::Write;
  size_t Read(void*, size_t) override { return 0; }
  size_t Write(const void* data, size_t size) override {
    out_->append(static_cast<const char*>(data), size);
    return size;
  }

 private:
  std::string* out_;
};

}  // namespace support
}  // namespace tvm
