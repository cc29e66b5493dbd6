// Quantized products for any armv8-a.
#include "bytes_plain.h"
#include "products.h"

extern const Level kPlain = {quantize<Bytes::run>, quantized_matmul, attend_plain};
