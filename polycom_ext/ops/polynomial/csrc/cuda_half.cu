#define POLYCOM_STORAGE HalfStorage
#define POLYCOM_INSTANCE float16
#include "cuda_instance.cuh"
