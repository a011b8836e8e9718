"""What happened, as typed events: line scanning, the hub that hands them to subscribers, JSON lines."""
