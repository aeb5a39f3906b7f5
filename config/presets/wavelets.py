# WaveKAN: learned Mexican hats as activations, with the parameters of the MLP.
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-wavelets"
use_kan = True
