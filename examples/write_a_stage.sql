-- purpose:    which samples are measured
-- reads:      nothing of any stage
-- returns:    shard, row, uid
-- parameters: none
select shard, row, uid
from samples
