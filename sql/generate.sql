-- purpose:    which prompts become images
-- reads:      key, prompt
-- returns:    shard, row, uid, key, prompt
-- parameters: none
select shard, row, uid, key, prompt
from samples
where prompt is not null
