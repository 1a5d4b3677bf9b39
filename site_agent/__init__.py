"""The site agent: trains in one datacenter and exchanges pseudo-gradients with the coordinator."""
