# The other control of dfa: all blocks but the last stay as they were drawn (of 4).
out_dir = "out-ablation/frozen_blocks"
freeze_blocks = 3
tie_weights = False
