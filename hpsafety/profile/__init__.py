"""`hpsafety profile <stage>`: a few steps of a stage under torch.profiler, and where their time goes."""
