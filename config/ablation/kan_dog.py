# WaveKAN with Differences of Gaussians.
out_dir = "out-ablation/kan_dog"
use_kan = True
kan_wavelet = "dog"
