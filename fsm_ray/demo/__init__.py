"""The demo behind `fsm-ray demo`: a registration bot, served by many workers, checked against one.

people      what people do in one chat with the bot
crowd       who they are, and where they talk
updates     the updates that Telegram makes of it, from a seed
dialogue    the bot: an aiogram dispatcher, and a session that needs no network
feeder      batches for workers: each conversation in order, with one worker at a time
worker      the Ray task that handles a batch
crew        the workers, and what is done when one is lost
reference   what one worker with aiogram's MemoryStorage makes of the same updates
report      what came out, and whether it agrees
display     how that looks on a terminal
run         all of it, from start to end

`dialogue`, `reference`, `worker`, `crew` and `run` need aiogram; the others do not.
"""
