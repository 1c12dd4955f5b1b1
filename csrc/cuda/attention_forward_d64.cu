// attention's forward for head dim 64.
#include "attention_forward.cuh"

HPS_ATTENTION_FORWARD(64)
