// The kernels, built once for each instruction set: KVR_ISA names it, the compiler's flags enable it.
//
// Nothing here may be shared with code built for another one: no templates or inline functions of the standard library,
// all names in an unnamed namespace.
//
// The arithmetic of one row never depends on the rows around it: sums run in an order fixed by positions and W alone.

#include "attention.h"
#include "passes.h"
#include "gemm.h"

namespace {

const KernelTable table = {KVR_ISA_NAME,   embed,  rms_norm, silu_mul, heads,    attention_scratch,
                           partial_floats, attend, merge,    multiply, quantize, highest_allowed};

}  // namespace

const KernelTable *KVR_TABLE() { return &table; }
