"""What the coordinator and the sites must agree on: config, messages, layouts, wire format, codecs."""
