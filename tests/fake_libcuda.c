/* Stands for libcuda.so.1 where there is no GPU: loads nothing, runs nothing, and remembers what the
   last launch was given, for tests/launches_without_a_gpu.py. */
#include "cuda.h"
#include <string.h>

static int sizes[256], count;
static unsigned char last[1 << 16];
static size_t used;
static int encoded;

/* The sizes of a kernel's parameters, which a real driver reads in its binary. */
void fake_expect(int n, const int *bytes) {
  count = n;
  memcpy(sizes, bytes, n * sizeof(int));
}
const unsigned char *fake_last_launch(void) { return last; }
size_t fake_last_launch_size(void) { return used; }
int fake_encoded(void) { return encoded; }

static void put(const void *data, size_t bytes) {
  memcpy(last + used, data, bytes);
  used += bytes;
}

/* Whether the launch may start before the one ahead of it has ended. */
static unsigned dependent(const CUlaunchConfig *config) {
  unsigned found = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      found += config->attrs[i].value.programmaticStreamSerializationAllowed != 0;
  return found;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra) {
  unsigned shape[] = {config->gridDimX,       config->gridDimY, config->gridDimZ, config->blockDimX,
                      config->sharedMemBytes, config->numAttrs, dependent(config), 0};
  used = 0;
  put(shape, sizeof shape);
  put(&config->hStream, sizeof config->hStream);
  put(&f, sizeof f);
  for (int i = 0; i < count; ++i)
    put(params[i], sizes[i]);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *dim, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  cuuint64_t *word = (cuuint64_t *)map;
  if ((cuuint64_t)address % 16)
    return CUDA_ERROR_INVALID_VALUE;
  ++encoded;
  memset(map, 0, sizeof *map);
  word[0] = (cuuint64_t)address;
  for (cuuint32_t i = 0; i < rank; ++i) {
    word[1 + i] = dim[i];
    word[6] = word[6] * 1024 + box[i];
    if (i + 1 < rank)
      word[7 + i] = strides[i];
  }
  word[12] = type * 10000 + swizzle * 100 + fill;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  *f = (CUfunction)4096;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = 232448; /* shared memory, where it is asked for */
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) {
  *version = 13020;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the fake driver";
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int index) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
