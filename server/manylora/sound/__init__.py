"""From a file of sound to what a speech model hears: decoding, resampling, windows and spectrograms. No torch."""
