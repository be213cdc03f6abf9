// Stands in for torch's header where csrc/bindings.cpp runs on CPU tensors: tests/test_cuda_bindings.py.
#pragma once
#define C10_CUDA_CHECK(call) static_cast<void>(call)
