-- purpose:    which prompts become images
-- reads:      key, prompt, image_draw
-- returns:    shard, row, uid, key, prompt, draw
-- parameters: $draw
select shard, row, uid, key, prompt,
       coalesce(image_draw + $draw, 0) as draw  -- the sample's drawing as it is, or the next; the first is 0
from samples
where prompt is not null
