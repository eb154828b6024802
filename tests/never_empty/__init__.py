"""Every way of touching a tensor × everything that can be touched × every state: right, or an error of ours."""
