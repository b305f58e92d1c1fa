#define POLYCOM_STORAGE BFloat16Storage
#define POLYCOM_INSTANCE bfloat16
#include "cuda_instance.cuh"
