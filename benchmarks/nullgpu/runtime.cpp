// The CUDA runtime of a GPU that does nothing: preloaded below a CUDA build of torch, it takes the place of libcudart.
//
// Kernels are counted and not computed. Memory is address space that is never written, up to NULLGPU_GIB GiB. Whatever
// makes the host wait is reported to a hook, so that its line can be named.
#include "nullgpu.h"

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#define OK cudaSuccess

// ---- state. It is never destroyed: torch calls from destructors that run after ours.

typedef void (*Hook)(int kind, const char* name, size_t bytes);

struct State {
  std::mutex mutex;
  std::unordered_map<const void*, std::string> kernels;  // by the address of their host function
  std::unordered_map<std::string, long> counts;
  std::map<uintptr_t, size_t> on_gpu, pinned;  // address and size
  std::map<uint64_t, size_t> physical;         // handles of expandable segments
  size_t used = 0, launches = 0, next_handle = 1;
  double busy_until = 0;
};

static State& state() {
  static State* one = new State;
  return *one;
}
static Hook hook = nullptr;
static thread_local int current_device = 0;

typedef std::lock_guard<std::mutex> Lock;

static double number(const char* name, double otherwise) {
  const char* text = getenv(name);
  return text ? atof(text) : otherwise;
}
static size_t capacity() {
  static size_t bytes = (size_t)(number("NULLGPU_GIB", 79.1) * (1ull << 30));
  return bytes;
}
static int capability() { return (int)number("NULLGPU_CAPABILITY", 90); }
static int device_count() { return (int)number("NULLGPU_COUNT", 1); }

static void report(Kind kind, const char* name, size_t bytes = 0) {
  if (hook) hook(kind, name, bytes);
}
static bool inside(const std::map<uintptr_t, size_t>& blocks, const void* pointer) {
  auto after = blocks.upper_bound((uintptr_t)pointer);
  if (after == blocks.begin()) return false;
  --after;
  return (uintptr_t)pointer < after->first + after->second;
}

// ---- time: with NULLGPU_US each kernel takes so many microseconds, beside the host.

static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}
static void work() {  // with the mutex held
  static double seconds = number("NULLGPU_US", 0) * 1e-6;
  State& s = state();
  s.busy_until = (s.busy_until > now() ? s.busy_until : now()) + seconds;
}
static cudaError_t wait_for_gpu(const char* name) {
  double left = state().busy_until - now();
  if (left > 0) {
    timespec t = {(time_t)left, (long)((left - (time_t)left) * 1e9)};
    nanosleep(&t, nullptr);
  }
  report(SYNC, name);
  return OK;
}

// ---- what a program asks: watch.py calls these.

NULLGPU_API void nullgpu_hook(Hook wanted) { hook = wanted; }
NULLGPU_API size_t nullgpu_launches() { return state().launches; }
NULLGPU_API void nullgpu_reset() {
  Lock lock(state().mutex);
  state().counts.clear();
  state().launches = 0;
}
NULLGPU_API size_t nullgpu_dump(char* out, size_t room) {  // lines of name, tab, number; returns the length of all
  Lock lock(state().mutex);
  std::string text;
  for (auto& one : state().counts) text += one.first + "\t" + std::to_string(one.second) + "\n";
  memcpy(out, text.data(), text.size() < room ? text.size() : room);
  return text.size();
}
NULLGPU_API void nullgpu_count(const char* name) { count_kernel(name); }

void count_kernel(const char* name) {
  Lock lock(state().mutex);
  state().launches++;
  state().counts[name]++;
  work();
}
void* new_handle() { return calloc(1, 64); }

// ---- kernels

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local std::vector<Configuration> configurations;

static cudaError_t launch(const void* kernel) {
  static int wanted = (int)number("NULLGPU_DEVICE", -1);
  if (wanted >= 0 && current_device != wanted) report(WRONG_DEVICE, "kernel");
  std::string name = "?";
  {
    Lock lock(state().mutex);
    auto found = state().kernels.find(kernel);
    if (found != state().kernels.end()) name = found->second;
  }
  count_kernel(name.c_str());
  return OK;
}

NULLGPU_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
NULLGPU_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared, *(void**)stream = last.stream;
  return OK;
}
NULLGPU_API void** __cudaRegisterFatBinary(void*) {
  static void* handle[4];
  return handle;
}
NULLGPU_API void __cudaRegisterFatBinaryEnd(void**) {}
NULLGPU_API void __cudaUnregisterFatBinary(void**) {}
NULLGPU_API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
NULLGPU_API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  Lock lock(state().mutex);
  state().kernels[host] = name;
}
NULLGPU_API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = (cudaKernel_t)host;
  return OK;
}
NULLGPU_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) { return launch(kernel); }
NULLGPU_API cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) { return launch(kernel); }
NULLGPU_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) { return launch(kernel); }
NULLGPU_API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return OK;
}
NULLGPU_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024, found->numRegs = 32, found->maxDynamicSharedSizeBytes = 232448;
  found->ptxVersion = found->binaryVersion = capability();
  return OK;
}
NULLGPU_API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return OK; }
NULLGPU_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t) {
  int fit = threads > 0 ? 2048 / threads : 1;
  *blocks = fit < 1 ? 1 : fit > 32 ? 32 : fit;
  return OK;
}
NULLGPU_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel, int threads, size_t shared, unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared);
}

// ---- the device: the numbers of an H100

NULLGPU_API cudaError_t cudaGetDeviceCount(int* count) { return *count = device_count(), OK; }
NULLGPU_API cudaError_t cudaGetDevice(int* device) { return *device = current_device, OK; }
NULLGPU_API cudaError_t cudaSetDevice(int device) { return current_device = device, OK; }
NULLGPU_API cudaError_t cudaDriverGetVersion(int* version) { return *version = 13020, OK; }
NULLGPU_API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13020, OK; }
NULLGPU_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "Null GPU");
  p->totalGlobalMem = capacity(), p->major = capability() / 10, p->minor = capability() % 10;
  p->multiProcessorCount = 132, p->warpSize = 32, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->l2CacheSize = 50 << 20, p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->totalConstMem = 65536, p->textureAlignment = 512, p->concurrentKernels = 1, p->unifiedAddressing = 1;
  p->canMapHostMemory = 1, p->asyncEngineCount = 3, p->memoryBusWidth = 5120, p->memPitch = 2147483647;
  p->cooperativeLaunch = 1;
  return OK;
}
NULLGPU_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> known = {
      {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535}, {8, 49152}, {10, 32}, {12, 65536},
      {13, 1980000}, {16, 132}, {36, 2619000}, {37, 5120}, {38, 50 << 20}, {39, 2048}, {81, 233472}, {82, 65536},
      {97, 232448}, {106, 32}, {75, capability() / 10}, {76, capability() % 10}};
  auto found = known.find((int)attribute);
  *value = found == known.end() ? 0 : found->second;
  return OK;
}
NULLGPU_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) { return *least = 0, *most = -5, OK; }
NULLGPU_API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, OK; }
NULLGPU_API cudaError_t cudaDeviceGetPCIBusId(char* text, int room, int) { return snprintf(text, room, "0000:00:00.0"), OK; }
NULLGPU_API cudaError_t cudaDeviceSynchronize() { return wait_for_gpu("cudaDeviceSynchronize"); }
NULLGPU_API cudaError_t cudaGetLastError() { return OK; }
NULLGPU_API cudaError_t cudaPeekAtLastError() { return OK; }
NULLGPU_API const char* cudaGetErrorName(cudaError_t e) { return e == 2 ? "cudaErrorMemoryAllocation" : "cudaError"; }
NULLGPU_API const char* cudaGetErrorString(cudaError_t e) { return e == 2 ? "out of memory" : e == 0 ? "no error" : "error"; }
NULLGPU_API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return OK; }

// ---- memory

static void* address_space(size_t bytes) {
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return found == MAP_FAILED ? nullptr : found;
}
NULLGPU_API cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  report(MALLOC, "cudaMalloc", bytes);
  Lock lock(state().mutex);
  size_t rounded = (bytes + 0x1fffff) & ~(size_t)0x1fffff;
  if (state().used + rounded > capacity()) return cudaErrorMemoryAllocation;
  *pointer = address_space(rounded ? rounded : 4096);
  if (!*pointer) return cudaErrorMemoryAllocation;
  state().used += rounded;
  state().on_gpu[(uintptr_t)*pointer] = rounded;
  return OK;
}
NULLGPU_API cudaError_t cudaFree(void* pointer) {
  Lock lock(state().mutex);
  auto block = state().on_gpu.find((uintptr_t)pointer);
  if (block == state().on_gpu.end()) return OK;
  munmap(pointer, block->second);
  state().used -= block->second;
  state().on_gpu.erase(block);
  return OK;
}
NULLGPU_API cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) { return cudaMalloc(pointer, bytes); }
NULLGPU_API cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
NULLGPU_API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return *total = capacity(), *free = capacity() - state().used, OK;
}
NULLGPU_API cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  report(PIN, current_device ? "cudaHostAlloc, another GPU than the first" : "cudaHostAlloc", bytes);
  *pointer = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
  Lock lock(state().mutex);
  if (*pointer) state().pinned[(uintptr_t)*pointer] = bytes;
  return *pointer ? OK : cudaErrorMemoryAllocation;
}
NULLGPU_API cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }
NULLGPU_API cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  Lock lock(state().mutex);
  state().pinned[(uintptr_t)pointer] = bytes;
  return OK;
}
NULLGPU_API cudaError_t cudaHostUnregister(void* pointer) {
  Lock lock(state().mutex);
  state().pinned.erase((uintptr_t)pointer);
  return OK;
}
NULLGPU_API cudaError_t cudaFreeHost(void* pointer) {
  cudaHostUnregister(pointer);
  free(pointer);
  return OK;
}
NULLGPU_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  Lock lock(state().mutex);
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeUnregistered;
  if (inside(state().on_gpu, pointer)) found->type = cudaMemoryTypeDevice, found->devicePointer = (void*)pointer;
  if (inside(state().pinned, pointer)) found->type = cudaMemoryTypeHost, found->hostPointer = found->devicePointer = (void*)pointer;
  return OK;
}
static cudaError_t copy(void* to, const void* from, size_t bytes, const char* name) {
  bool to_gpu, from_gpu, to_pinned, from_pinned;
  {
    Lock lock(state().mutex);
    to_gpu = inside(state().on_gpu, to), from_gpu = inside(state().on_gpu, from);
    to_pinned = inside(state().pinned, to), from_pinned = inside(state().pinned, from);
  }
  if (to_gpu && from_gpu) count_kernel("memcpy within the GPU");
  else if (to_gpu) report(from_pinned ? TO_GPU_PINNED : TO_GPU_PAGEABLE, name, bytes);
  else if (from_gpu) report(to_pinned ? TO_HOST_PINNED : TO_HOST_PAGEABLE, name, bytes);
  if (!to_gpu) memcpy(to, from, bytes);  // nothing is ever written to the GPU: reading it gives zeros
  return OK;
}
NULLGPU_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) { return copy(to, from, bytes, "cudaMemcpyAsync"); }
NULLGPU_API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  copy(to, from, bytes, "cudaMemcpy");
  return wait_for_gpu("cudaMemcpy");
}
NULLGPU_API cudaError_t cudaMemcpy2DAsync(void*, size_t, const void*, size_t, size_t, size_t, cudaMemcpyKind, cudaStream_t) { return count_kernel("memcpy2D"), OK; }
NULLGPU_API cudaError_t cudaMemset(void*, int, size_t) { return count_kernel("memset"), OK; }
NULLGPU_API cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return count_kernel("memset"), OK; }
NULLGPU_API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return OK; }
NULLGPU_API cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char room[4096];
  return *pointer = room, OK;
}

// ---- streams and events

NULLGPU_API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = (cudaStream_t)new_handle(), OK; }
NULLGPU_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
NULLGPU_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return cudaStreamCreate(stream); }
NULLGPU_API cudaError_t cudaStreamDestroy(cudaStream_t) { return OK; }
NULLGPU_API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, OK; }
NULLGPU_API cudaError_t cudaStreamSynchronize(cudaStream_t) { return wait_for_gpu("cudaStreamSynchronize"); }
NULLGPU_API cudaError_t cudaStreamQuery(cudaStream_t) { return OK; }
NULLGPU_API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return OK; }
NULLGPU_API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) { return *status = cudaStreamCaptureStatusNone, OK; }
NULLGPU_API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  return *status = cudaStreamCaptureStatusNone, OK;
}
NULLGPU_API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  function(stream, OK, data);
  return OK;
}
NULLGPU_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = (cudaEvent_t)calloc(1, sizeof(double)), OK; }
NULLGPU_API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
NULLGPU_API cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), OK; }
NULLGPU_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  double begin = now();
  *(double*)event = state().busy_until > begin ? state().busy_until : begin;
  return OK;
}
NULLGPU_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) { return cudaEventRecord(event, stream); }
NULLGPU_API cudaError_t cudaEventQuery(cudaEvent_t) { return OK; }
NULLGPU_API cudaError_t cudaEventSynchronize(cudaEvent_t) { return wait_for_gpu("cudaEventSynchronize"); }
NULLGPU_API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  return *ms = (float)((*(double*)to - *(double*)from) * 1e3), OK;
}

// ---- functions of the driver that torch asks for by name: contexts, and the memory of expandable segments

static int driver_ok() { return 0; }
static int context(void** found) { return *found = (void*)1, 0; }
static int context_state(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  return *active = 1, 0;
}
static int reserve(uintptr_t* address, size_t bytes, size_t, uintptr_t, unsigned long long) {
  *address = (uintptr_t)address_space(bytes);
  Lock lock(state().mutex);
  if (*address) state().on_gpu[*address] = bytes;
  return *address ? 0 : 2;
}
static int release_address(uintptr_t address, size_t bytes) {
  Lock lock(state().mutex);
  state().on_gpu.erase(address);
  return munmap((void*)address, bytes);
}
static int create_memory(uint64_t* handle, size_t bytes, const void*, unsigned long long) {
  report(MALLOC, "cuMemCreate", bytes);
  Lock lock(state().mutex);
  if (state().used + bytes > capacity()) return 2;
  state().used += bytes;
  *handle = state().next_handle++;
  state().physical[*handle] = bytes;
  return 0;
}
static int release_memory(uint64_t handle) {
  Lock lock(state().mutex);
  auto found = state().physical.find(handle);
  if (found != state().physical.end()) state().used -= found->second, state().physical.erase(found);
  return 0;
}
NULLGPU_API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  static const std::map<std::string, void*> known = {
      {"cuCtxGetCurrent", (void*)context}, {"cuDevicePrimaryCtxGetState", (void*)context_state},
      {"cuMemAddressReserve", (void*)reserve}, {"cuMemAddressFree", (void*)release_address},
      {"cuMemCreate", (void*)create_memory}, {"cuMemRelease", (void*)release_memory}};
  auto function = known.find(name);
  *found = function == known.end() ? (void*)driver_ok : function->second;
  if (result) *result = cudaDriverEntryPointSuccess;
  return OK;
}
