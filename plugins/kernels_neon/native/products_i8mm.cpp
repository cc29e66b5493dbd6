// Quantized products for processors with FEAT_I8MM.
#include "bytes_i8mm.h"
#include "products.h"

extern const Level kI8mm = {quantize<Bytes::run>, quantized_matmul, attend_i8mm};
