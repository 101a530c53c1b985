"""Every fault of Redis and the network, crossed with every outage answer, measured."""
