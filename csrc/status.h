// What a launcher says came of a call.
//
// Compile: plain C++17.
#pragma once

namespace mapet {

struct Status {
  const char* problem = nullptr;  // null where all is well, else a line for the reader of an error
  int error = 0;                  // the CUDA runtime's own reason (cudaError_t), where it gave one

  bool ok() const { return problem == nullptr; }
};

}  // namespace mapet
