# WaveKAN with derivatives of Gaussians.
out_dir = "out-ablation/kan_gaus1"
use_kan = True
kan_wavelet = "gaus1"
