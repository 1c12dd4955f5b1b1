// attention's forward for head dim 128.
#include "attention_forward.cuh"

HPS_ATTENTION_FORWARD(128)
