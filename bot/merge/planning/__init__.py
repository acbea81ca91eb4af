"""Recipe + checkpoints -> Plan: every tensor, shape, byte offset and number, before a weight is read."""
