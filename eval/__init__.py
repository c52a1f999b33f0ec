"""The harness: accuracy of methods beside the uncompressed baseline."""
