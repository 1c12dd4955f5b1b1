// What the library says of itself, before any kernel is launched.
#include "device.cuh"

// Of the launchers' signatures: hpsafety/cuda_kernels/library.py has the same number.
extern "C" int hps_abi() { return 1; }

#ifdef __CUDACC__
extern "C" int hps_versions(int* runtime, int* driver) {
  cudaError_t raised = cudaRuntimeGetVersion(runtime);
  return static_cast<int>(raised == cudaSuccess ? cudaDriverGetVersion(driver) : raised);
}
extern "C" const char* hps_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#else
extern "C" int hps_versions(int* runtime, int* driver) { return *runtime = *driver = 0; }
extern "C" const char* hps_error(int) { return "refused by the launcher"; }
#endif
