"""Studies of composition: LoRAs trained apart, put together in many ways, and asked what each of them still knows."""
