# WaveKAN instead of the MLP: learned Mexican hats per hidden unit, with as many parameters.
out_dir = "out-ablation/kan"
use_kan = True
