// A library of a model answers nobody over a network.
#include "src/runtime/rpc/rpc_session.h"

namespace tvm {
namespace runtime {
ffi::Module CreateRPCSessionModule(std::shared_ptr<RPCSession>) {
  LOG(FATAL) << "this library has no remote sessions";
}
}  // namespace runtime
}  // namespace tvm
