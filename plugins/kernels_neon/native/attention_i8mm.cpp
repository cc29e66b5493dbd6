// Attention for processors with FEAT_I8MM.
#include "bytes_i8mm.h"
#include "attention.h"

void attend_i8mm(const AttentionTask& task) { attend(task); }
