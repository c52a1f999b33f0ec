"""Result files: samples, their locks and fingerprints."""
