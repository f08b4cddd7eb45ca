# Importing this module registers the C++ operators of csrc/ops.cpp under torch.ops.spac.
