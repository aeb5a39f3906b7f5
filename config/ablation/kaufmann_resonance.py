# Kaufmann attention whose stimulus a learned wave of the position scales.
out_dir = "out-ablation/kaufmann_resonance"
use_kaufmann_attention = True
kaufmann_resonance = True
