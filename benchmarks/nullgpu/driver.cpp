// The CUDA driver of a GPU that does nothing, as libcuda.so.1: what Triton needs to load kernels and to start them. As
// libnvidia-ml.so.1 it is the library that manages GPUs, which torch asks for links between them.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <map>

#define API extern "C" __attribute__((visibility("default")))
#define NOTHING(name) \
  API int name() { return 0; }

static int count(const void* kernel) {
  static auto report = (void (*)(const char*))dlsym(RTLD_DEFAULT, "nullgpu_count");
  if (report && kernel) report((const char*)kernel);
  return 0;
}

API int cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
API int cuCtxGetDevice(int* device) { return *device = 0, 0; }
API int cuDeviceGet(int* device, int number) { return *device = number, 0; }
API int cuDeviceGetCount(int* number) { return *number = 1, 0; }
API int cuDeviceGetAttribute(int* value, int attribute, int) {
  static const std::map<int, int> known = {{1, 1024}, {10, 32}, {12, 65536}, {13, 1980000}, {16, 132}, {36, 2619000},
                                           {37, 5120}, {75, 9}, {81, 233472}, {82, 65536}, {97, 232448}};
  auto found = known.find(attribute);
  return *value = found == known.end() ? 0 : found->second, 0;
}
API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  return *active = 1, 0;
}
API int cuDevicePrimaryCtxRetain(void** context, int) { return *context = (void*)1, 0; }
API int cuDriverGetVersion(int* version) { return *version = 13020, 0; }
API int cuGetErrorName(int, const char** text) { return *text = "error", 0; }
API int cuGetErrorString(int, const char** text) { return *text = "error", 0; }
API int cuPointerGetAttribute(void** data, int, uint64_t pointer) { return *data = (void*)pointer, 0; }
API int cuFuncGetAttribute(int* value, int attribute, void*) { return *value = attribute == 4 ? 32 : attribute == 0 ? 1024 : 0, 0; }
API int cuOccupancyMaxActiveClusters(int* number, ...) { return *number = 1, 0; }
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* number, ...) { return *number = 2, 0; }

// A function of a module is its name, so that its launches can be counted.
API int cuModuleLoad(void** module, const char*) { return *module = (void*)8, 0; }
API int cuModuleLoadData(void** module, const void*) { return *module = (void*)8, 0; }
API int cuModuleLoadDataEx(void** module, const void*, ...) { return *module = (void*)8, 0; }
API int cuModuleGetFunction(void** function, void*, const char* name) { return *function = strdup(name), 0; }
API int cuLaunchKernel(void* function, ...) { return count(function); }
API int cuLaunchKernelEx(const void*, void* function, void**, void**) { return count(function); }

NOTHING(cuInit) NOTHING(cuCtxPopCurrent_v2) NOTHING(cuCtxPushCurrent_v2) NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSynchronize) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetLimit) NOTHING(cuDeviceGetName) NOTHING(cuFuncLoad)
NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuLaunchCooperativeKernel) NOTHING(cuLinkAddData_v2)
NOTHING(cuLinkComplete) NOTHING(cuLinkCreate_v2) NOTHING(cuModuleUnload) NOTHING(cuStreamSynchronize)
NOTHING(cuStreamIsCapturing) NOTHING(cuTensorMapEncodeIm2col) NOTHING(cuTensorMapEncodeTiled)

API int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
  static void* own = dlopen("libcuda.so.1", RTLD_NOW);
  *function = dlsym(own, name);
  if (status) *status = 0;
  return *function ? 0 : 500;
}
API int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags, int* status) {
  return cuGetProcAddress_v2(name, function, version, flags, status);
}

API int nvmlInit_v2() { return 0; }
API int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** device) { return *device = (void*)1, 0; }
API int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* number, void*) { return *number = 0, 0; }
NOTHING(nvmlDeviceGetNvLinkRemoteDeviceType) NOTHING(nvmlDeviceGetNvLinkRemotePciInfo_v2)
NOTHING(nvmlSystemGetCudaDriverVersion_v2) NOTHING(nvmlDeviceGetGpuFabricInfoV)
