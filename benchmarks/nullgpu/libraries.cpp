// cuBLAS, cuDNN (with version 7 of its interface for convolutions) and the eigenvalues of cuSOLVER, of a GPU that does
// nothing.
#include "nullgpu.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define NOTHING(name) \
  NULLGPU_API int name() { return 0; }
#define HANDLE(name) \
  NULLGPU_API int name(void** handle) { return *handle = new_handle(), 0; }
#define KERNEL(name) \
  NULLGPU_API int name() { return count_kernel(#name), 0; }
#define NO_MEMORY(name, place) \
  NULLGPU_API int name place { return *bytes = 4096, 0; }

// ---- cuBLAS

HANDLE(cublasCreate_v2)
NULLGPU_API int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
NULLGPU_API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, 0; }
NOTHING(cublasDestroy_v2) NOTHING(cublasSetMathMode) NOTHING(cublasSetPointerMode_v2) NOTHING(cublasSetSmCountTarget)
NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2)
KERNEL(cublasGemmEx) KERNEL(cublasGemmStridedBatchedEx) KERNEL(cublasSgemm_v2) KERNEL(cublasDgemm_v2)
KERNEL(cublasSgemmEx) KERNEL(cublasSgemmStridedBatched) KERNEL(cublasDgemmStridedBatched) KERNEL(cublasSgemmBatched)
KERNEL(cublasDgemmBatched) KERNEL(cublasSgemv_v2) KERNEL(cublasDgemv_v2) KERNEL(cublasSdot_v2) KERNEL(cublasDdot_v2)
KERNEL(cublasDotEx) KERNEL(cublasLtMatmul)

NULLGPU_API size_t cublasLtGetVersion() { return 130401; }
NULLGPU_API int cublasLtMatmulDescCreate(void** handle, int, int) { return *handle = new_handle(), 0; }
NULLGPU_API int cublasLtMatmulDescDestroy(void* handle) { return free(handle), 0; }
NULLGPU_API int cublasLtMatrixLayoutCreate(void** handle, int, uint64_t, uint64_t, int64_t) { return *handle = new_handle(), 0; }
NULLGPU_API int cublasLtMatrixLayoutDestroy(void* handle) { return free(handle), 0; }
NULLGPU_API int cublasLtMatmulPreferenceCreate(void** handle) { return *handle = new_handle(), 0; }
NULLGPU_API int cublasLtMatmulPreferenceDestroy(void* handle) { return free(handle), 0; }
NULLGPU_API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, char* result, int* found) {
  memset(result, 0, 72);
  return *found = 1, 0;
}
NOTHING(cublasLtMatmulDescSetAttribute) NOTHING(cublasLtMatrixLayoutSetAttribute) NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatmulAlgoCheck) NOTHING(cublasLtMatmulAlgoInit) NOTHING(cublasLtMatmulAlgoConfigSetAttribute)
NOTHING(cublasLtMatmulAlgoConfigGetAttribute)

// ---- cuSOLVER

HANDLE(cusolverDnCreate) HANDLE(cusolverDnCreateParams)
NOTHING(cusolverDnDestroy) NOTHING(cusolverDnDestroyParams) NOTHING(cusolverDnSetStream) NOTHING(cusolverDnSetDeterministicMode)
KERNEL(cusolverDnXsyevd) KERNEL(cusolverDnXsyevBatched)
NULLGPU_API int cusolverDnXsyevd_bufferSize(void*, void*, int, int, int64_t, int, const void*, int64_t, int, const void*, int, size_t* on_gpu, size_t* on_host) {
  return *on_gpu = *on_host = 4096, 0;
}
NULLGPU_API int cusolverDnXsyevBatched_bufferSize(void*, void*, int, int, int64_t, int, const void*, int64_t, int, const void*, int, size_t* on_gpu, size_t* on_host, int64_t) {
  return *on_gpu = *on_host = 4096, 0;
}

// ---- cuDNN

NULLGPU_API size_t cudnnGetVersion() { return 92600; }
NULLGPU_API size_t cudnnGetCudartVersion() { return 13020; }
NULLGPU_API int cudnnGetProperty(int which, int* value) { return *value = which == 0 ? 9 : which == 1 ? 26 : 0, 0; }
NULLGPU_API const char* cudnnGetErrorString(int) { return "null GPU"; }
NULLGPU_API void cudnnGetLastErrorString(char* text, size_t room) {
  if (room) *text = 0;
}
HANDLE(cudnnCreate) HANDLE(cudnnCreateTensorDescriptor) HANDLE(cudnnCreateFilterDescriptor)
HANDLE(cudnnCreateConvolutionDescriptor) HANDLE(cudnnCreateActivationDescriptor) HANDLE(cudnnCreateDropoutDescriptor)
HANDLE(cudnnCreatePoolingDescriptor)
NOTHING(cudnnDestroyTensorDescriptor) NOTHING(cudnnDestroyFilterDescriptor) NOTHING(cudnnDestroyConvolutionDescriptor)
NOTHING(cudnnDestroyActivationDescriptor) NOTHING(cudnnSetStream) NOTHING(cudnnSetTensorNdDescriptor)
NOTHING(cudnnSetFilterNdDescriptor) NOTHING(cudnnSetConvolutionNdDescriptor) NOTHING(cudnnSetConvolutionGroupCount)
NOTHING(cudnnSetConvolutionMathType) NOTHING(cudnnSetActivationDescriptor)
KERNEL(cudnnConvolutionForward) KERNEL(cudnnConvolutionBackwardData) KERNEL(cudnnConvolutionBackwardFilter)
KERNEL(cudnnConvolutionBiasActivationForward) KERNEL(cudnnBatchNormalizationForwardTrainingEx)
KERNEL(cudnnBatchNormalizationBackwardEx) KERNEL(cudnnBatchNormalizationForwardInference) KERNEL(cudnnPoolingForward)

struct Performance {
  int algorithm, status;
  float time;
  size_t memory;
  int is_deterministic, math_type, reserved[3];
};
static int algorithm(Performance* found, int* count) {
  memset(found, 0, sizeof *found);
  found->algorithm = found->is_deterministic = found->math_type = *count = 1;
  return 0;
}
#define ALGORITHM(name) \
  NULLGPU_API int name(void*, void*, void*, void*, void*, int, int* count, Performance* found) { return algorithm(found, count); }
ALGORITHM(cudnnGetConvolutionForwardAlgorithm_v7) ALGORITHM(cudnnGetConvolutionBackwardDataAlgorithm_v7)
ALGORITHM(cudnnGetConvolutionBackwardFilterAlgorithm_v7)
#define CONVOLUTION (void*, void*, void*, void*, void*, int, size_t* bytes)
NO_MEMORY(cudnnGetConvolutionForwardWorkspaceSize, CONVOLUTION)
NO_MEMORY(cudnnGetConvolutionBackwardDataWorkspaceSize, CONVOLUTION)
NO_MEMORY(cudnnGetConvolutionBackwardFilterWorkspaceSize, CONVOLUTION)
NO_MEMORY(cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize, (void*, int, int, void*, void*, void*, void*, void*, size_t* bytes))
NO_MEMORY(cudnnGetBatchNormalizationBackwardExWorkspaceSize, (void*, int, int, void*, void*, void*, void*, void*, void*, void*, size_t* bytes))
NO_MEMORY(cudnnGetBatchNormalizationTrainingExReserveSpaceSize, (void*, int, int, void*, void*, size_t* bytes))
