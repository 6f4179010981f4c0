-- purpose:    which prompts become images
-- reads:      key, prompt, image_draw, generate_status
-- returns:    shard, row, uid, key, prompt, draw
-- parameters: $draw
select shard, row, uid, key, prompt,
       -- the sample's drawing as it is, or the next; the first is 0, and the next of one that failed 1
       coalesce(image_draw + $draw, case generate_status when 'failed' then $draw end, 0) as draw
from samples
where prompt is not null
