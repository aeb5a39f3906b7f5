# WaveKAN: learned Mexican hats as activations, with the parameters of the MLP.
out_dir = "out-wavelets"
use_kan = True
