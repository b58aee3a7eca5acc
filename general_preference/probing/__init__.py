"""Which head fits which data: heads trained on the kept hidden states of a frozen backbone, and their comparison."""
