// Attention for any armv8-a.
#include "bytes_plain.h"
#include "attention.h"

void attend_plain(const AttentionTask& task) { attend(task); }
