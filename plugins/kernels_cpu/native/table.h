// Every kernel of an instruction set. The including file has defined kTile and Dot (quantized.h).
#pragma once
#include "attention.h"
#include "elementwise.h"
#include "low_rank.h"
#include "matmul.h"
#include "moves.h"
#include "pack.h"

#define RV_TABLE(NAME) \
    {NAME, kTile, norm, quantize, pack, matmul, decode_row, rope, store_kv, gated, attend, move, softcap, \
     shrink, add_rows}
