// What edgekit needs of ExecuTorch's C++ runtime, in C, so that Python can call it without torch.
//
// One decoder: forward(tokens int64 [1, S], input_pos int64 [S]) -> logits. Nothing here throws, and
// every pointer that is returned stays valid until the next call on the same handle.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>

namespace executorch::extension::threadpool {  // the wheel has the library, but not this header
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Program;

constexpr size_t kLogBytes = 8192;
std::mutex log_lock;
std::string log_text;

void keep(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t,
          const char* message, size_t length) {
  if (level != kError && level != kFatal) return;
  std::lock_guard<std::mutex> guard(log_lock);
  log_text.append(message, length).push_back('\n');
  if (log_text.size() > kLogBytes) log_text.erase(0, log_text.size() - kLogBytes);
}

// The runtime aborts over what it takes for its own mistake; then its last words are all there is.
[[noreturn]] void stop() {
  std::fputs(log_text.c_str(), stderr);
  std::abort();
}

// What a damaged file may claim, a planned buffer of 2^60 bytes for one, ends as an error code.
template <typename Call>
int guarded(Call call) {
  try {
    return static_cast<int>(call());
  } catch (const std::exception& error) {
    keep(0, kError, "", "", 0, error.what(), std::strlen(error.what()));
    return static_cast<int>(Error::MemoryAllocationFailed);
  }
}

struct Decoder {
  Module module;
  std::vector<int64_t> tokens, positions;
  std::vector<float> widened;  // logits that the program gives in half precision
};

template <typename Half>
const float* widen(const executorch::aten::Tensor& logits, std::vector<float>& into) {
  const Half* first = logits.const_data_ptr<Half>();
  into.assign(first, first + logits.numel());
  return into.data();
}

}  // namespace

extern "C" {

// May be called again: what else runs in the process takes the log, too. Written into the table,
// since register_pal() tells standard error that another has registered before.
void edgekit_start() {
  auto* platform = const_cast<executorch::runtime::PalImpl*>(executorch::runtime::get_pal_impl());
  platform->emit_log_message = keep;
  platform->abort = stop;
  executorch::runtime::runtime_init();
}

// Returns what the runtime said since it was last asked; not to be called from two threads.
const char* edgekit_log() {
  static std::string text;
  std::lock_guard<std::mutex> guard(log_lock);
  text.swap(log_text);
  log_text.clear();
  return text.c_str();
}

bool edgekit_has_kernel(const char* name) {
  for (const auto& kernel : executorch::runtime::get_registered_kernels()) {
    if (std::strcmp(kernel.name_, name) == 0) return true;
  }
  return false;
}

bool edgekit_has_backend(const char* name) {
  return executorch::runtime::get_backend_class(name) != nullptr;
}

// One pool serves the process; XNNPACK keeps it from when a program is opened.
int edgekit_threads(int wanted) {
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (pool == nullptr) return 1;
  if (wanted > 0) pool->_unsafe_reset_threadpool(static_cast<uint32_t>(wanted));
  return static_cast<int>(pool->get_thread_count());
}

int edgekit_open(const char* path, bool maps_file, Decoder** opened) {
  return guarded([&] {
    auto mode = maps_file ? Module::LoadMode::Mmap : Module::LoadMode::File;
    auto decoder = std::unique_ptr<Decoder>(new Decoder{Module(path, mode), {}, {}, {}});
    Error error = decoder->module.load(Program::Verification::InternalConsistency);
    if (error == Error::Ok) error = decoder->module.load_method("forward");
    if (error == Error::Ok) *opened = decoder.release();
    return error;
  });
}

void edgekit_close(Decoder* decoder) { delete decoder; }

// Fills in the numbers that a method without inputs returns, and how many there are.
int edgekit_constants(Decoder* decoder, const char* method, int64_t* values, int* count) {
  return guarded([&] {
    auto found = decoder->module.execute(method);
    if (!found.ok()) return found.error();
    const int capacity = *count;
    *count = 0;
    for (const EValue& value : *found) {
      if (!(value.isInt() || value.isBool())) return Error::InvalidType;
      if (*count == capacity) return Error::OutOfResources;
      values[(*count)++] = value.isInt() ? value.toInt() : int64_t{value.toBool()};
    }
    return Error::Ok;
  });
}

// Fills in the length of the first two inputs at their longest.
int edgekit_limits(Decoder* decoder, int64_t* tokens, int64_t* positions) {
  return guarded([&] {
    auto method = decoder->module.method_meta("forward");
    if (!method.ok()) return method.error();
    auto first = method->input_tensor_meta(0), second = method->input_tensor_meta(1);
    if (!first.ok() || !second.ok()) return Error::InvalidArgument;
    if (first->sizes().size() != 2 || second->sizes().size() != 1) return Error::InvalidArgument;
    *tokens = first->sizes()[1];
    *positions = second->sizes()[0];
    return Error::Ok;
  });
}

// Reads tokens at the positions from `position` on; the logits of the last rows come back.
int edgekit_read(Decoder* decoder, const int64_t* tokens, int count, int64_t position,
                 const float** logits, int64_t* rows, int64_t* width) {
  return guarded([&] {
    decoder->tokens.assign(tokens, tokens + count);
    decoder->positions.resize(count);
    for (int index = 0; index < count; ++index) decoder->positions[index] = position + index;
    auto ids = from_blob(decoder->tokens.data(), {1, count}, ScalarType::Long);
    auto places = from_blob(decoder->positions.data(), {count}, ScalarType::Long);
    auto said = decoder->module.forward({ids, places});
    if (!said.ok()) return said.error();
    if (said->size() != 1 || !said->at(0).isTensor()) return Error::InvalidType;
    const auto& tensor = said->at(0).toTensor();
    *width = tensor.size(tensor.dim() - 1);
    *rows = *width ? tensor.numel() / *width : 0;
    switch (tensor.scalar_type()) {
      case ScalarType::Float: *logits = tensor.const_data_ptr<float>(); break;
      case ScalarType::Half:
        *logits = widen<executorch::aten::Half>(tensor, decoder->widened);
        break;
      case ScalarType::BFloat16:
        *logits = widen<executorch::aten::BFloat16>(tensor, decoder->widened);
        break;
      default: return Error::InvalidType;
    }
    return Error::Ok;
  });
}

}  // extern "C"
