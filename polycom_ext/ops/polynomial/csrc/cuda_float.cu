#define POLYCOM_STORAGE FloatStorage
#define POLYCOM_INSTANCE float32
#include "cuda_instance.cuh"
