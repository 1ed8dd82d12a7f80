"""Imported first, and only, by the process that the decoders are forked from: no library shall start a thread there.

A fork copies the thread that calls it and no other, so a lock that another one holds stays locked for ever.
"""

import os

# NumPy's, otherwise one for each core, and pyarrow's
os.environ.update(OPENBLAS_NUM_THREADS="1", JE_ARROW_MALLOC_CONF="background_thread:false")
