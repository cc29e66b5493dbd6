// Quantized products for processors with FEAT_DotProd.
#include "bytes_dotprod.h"
#include "products.h"

extern const Level kDotprod = {quantize<Bytes::run>, quantized_matmul, attend_dotprod};
