// Attention for processors with FEAT_DotProd.
#include "bytes_dotprod.h"
#include "attention.h"

void attend_dotprod(const AttentionTask& task) { attend(task); }
