"""TensorRT in both its flavours: `tensorrt` and `tensorrt-rtx`. Importing this loads neither."""
